"""The methods: how to explore, what to optimise, what to hold on to. One method a file."""
