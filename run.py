"""The command line: `python run.py [CHECKPOINT] -m MODE …`."""

from getp_command import main

if __name__ == "__main__":
    main()
