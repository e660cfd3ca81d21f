"""What is done to the images of a batch before it is learned."""
