"""What denoising and training rows look like, for people: in a terminal and as a page. Nothing here runs a model."""
