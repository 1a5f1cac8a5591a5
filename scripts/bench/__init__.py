"""metarun against its peers: one meta-step, the same model, tasks and inner steps for all."""
