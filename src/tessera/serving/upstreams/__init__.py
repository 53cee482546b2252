"""Models behind other people's URLs, under the same payment, limits and count as our own."""
