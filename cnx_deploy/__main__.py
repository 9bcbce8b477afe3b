"""`python -m cnx_deploy` is `cnx-deploy`."""

from cnx_deploy.cli import main

if __name__ == "__main__":
    main()
