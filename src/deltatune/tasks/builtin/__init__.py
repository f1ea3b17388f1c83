"""The built-in tasks and the script that generates them."""
