"""The three kinds of models that can be calibrated, each a `turbovlm.calibration.subject.Subject`."""
