"""Where drafts come from: one file a proposer, one table of them."""
