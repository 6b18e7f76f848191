"""Exported tables published as versions, and a server that scores with the current one. Nothing here needs torch."""
