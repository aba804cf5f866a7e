"""The worker as others meet it: the stepping thread, its client over HTTP, the process and its supervisor."""
