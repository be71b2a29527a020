"""What long runs add to dansm.py, one room for each concern. docs/design.md has the map."""
