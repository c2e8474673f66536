"""What makes a head a repository: its card."""
