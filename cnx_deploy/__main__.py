"""`python -m cnx_deploy` is `cnx-deploy`."""

from cnx_deploy.cli import main

main()
