"""Who is paid: vouchers that workers check, receipts after the work, and the tally that gives income out."""
