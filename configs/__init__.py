"""The packaged gin files, found by ``armillary train --gin_file`` wherever armillary is installed."""
