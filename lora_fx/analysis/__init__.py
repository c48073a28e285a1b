"""What weights do, and which of them rules mean."""
