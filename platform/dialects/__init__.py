"""The request and answer forms of other servers, over the same services as our own routes."""
