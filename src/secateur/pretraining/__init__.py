"""How does `secateur pretrain` run: data, model, Trainer, resume, and what it leaves on the disk?"""
