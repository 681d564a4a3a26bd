"""What is recorded about money: ledger, budget, prices, holds, and what commands ask for."""
