"""Any model, any setting, any order of calls: what must hold, drawn by hypothesis (`make fuzz`)."""
