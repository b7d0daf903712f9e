"""turbovlm inside evaluation harnesses: lmms-eval and VLMEvalKit."""
