"""Adapters from elsewhere: pulled over HTTP, from a hub, a bucket or a server directory, into the
same intake as an upload. Nothing here runs because of an inference request.
"""
