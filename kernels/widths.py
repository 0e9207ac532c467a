"""How many of each a request may have: the widths of the sampler's tensors. Without torch, for whoever only checks requests."""

MAX_BIAS = 300  # logit_bias entries of a request (as in the OpenAI API)
MAX_STOP_IDS = 32  # stop ids of a request, the checkpoint's own included
TOP_LOGPROBS = 20  # most alternatives that can be reported for a token
