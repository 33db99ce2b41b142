"""The program `secateur pretrain`: data, model, Trainer, resume, and what a run leaves on the disk."""
