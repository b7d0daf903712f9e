"""`turbovlm demo`: what merging saves and what it costs, on photographs and with a pretrained model."""
