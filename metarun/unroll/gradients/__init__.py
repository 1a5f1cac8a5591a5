"""How an unroll is differentiated: its modes, and what each needs of the loss."""
