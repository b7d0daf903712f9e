"""Quality on tasks: data in the field's own formats, official metrics, and runs that go on where they stopped."""
