"""What people see of a run: metrics, videos, pictures, tables, progress."""
