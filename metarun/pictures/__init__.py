"""Pictures as users have them: which there are, reading any of them, and converting all of them."""
