"""What must outlive a script run of a page: the feed of the engine's series, chat streams, the run recorder."""
