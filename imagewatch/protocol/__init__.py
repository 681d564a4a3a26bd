"""The folder protocol (docs/protocol.md) in code: names, prompts, images, requests, and the values of a job."""
