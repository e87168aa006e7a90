class UserError(Exception):
    """A mistake by the user: one line that says what is wrong and what would be right."""
