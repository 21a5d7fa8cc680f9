"""Image classification: pictures in patches, one label each."""
