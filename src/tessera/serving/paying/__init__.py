"""How a request is paid: the ways to pay, who is asking, what is set aside, what is owed."""
