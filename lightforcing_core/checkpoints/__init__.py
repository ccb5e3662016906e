"""Reading model files safely and turning every known layout into Wan names."""
