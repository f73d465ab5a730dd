"""What is asked, and where: sizes, routing, number formats, hardware, together a `World`. Nothing here has a time."""
