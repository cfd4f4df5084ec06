"""Tables of what compression did and what it cost."""
