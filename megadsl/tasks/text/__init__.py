"""Finetuning tasks over short texts: classification, multiple choice, span questions."""
