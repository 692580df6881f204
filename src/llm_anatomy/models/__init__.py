"""One readable file per architecture; import the class you want from its own module."""
