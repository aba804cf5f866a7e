"""The worker's HTTP face: the OpenAI API, ``/metrics``, and the admin API behind a token."""
