"""What to do: deployments, the solver, remedies, trade-offs, launch commands, documents, money."""
