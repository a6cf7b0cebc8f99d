"""What a user types: a file for each command, which combines what lies below."""
