"""Results of the papers as runnable checks: each file states one result and measures by how much it fails to hold."""
