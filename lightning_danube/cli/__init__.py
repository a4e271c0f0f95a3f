"""The command line: LightningCLI for the trainer's verbs, and the project's own verbs."""
