"""Who runs next: requests, their states, and the plan of each step."""
