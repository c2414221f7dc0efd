"""Images: opened, laid out as tiles, cut into patches. All but opening is arithmetic."""
