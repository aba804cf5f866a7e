"""Request state and the scheduler: static and continuous batching, preemption."""
