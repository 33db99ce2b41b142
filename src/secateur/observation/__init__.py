"""What did the experts of a live model do?"""
