"""Where labelled texts come from: one file a source, each with `read(settings) -> Dataset`."""
