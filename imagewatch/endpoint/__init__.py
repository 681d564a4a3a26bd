"""The image API: what responses mean, connections, decoding, downloads."""
