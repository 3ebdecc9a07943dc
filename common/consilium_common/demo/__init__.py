"""The demonstration: three synthetic hospitals, their images, and a study over them."""
