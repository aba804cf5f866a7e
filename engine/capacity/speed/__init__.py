"""How quick it is: the roofline of a step, queueing, a deployment under load, speculation."""
