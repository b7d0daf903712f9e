"""Settings found on a user's own images, and what they promise for others: `turbovlm.calibrate`."""
